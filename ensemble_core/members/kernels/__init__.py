"""What members compute beside products of matrices: plain, or as compiled loops."""
