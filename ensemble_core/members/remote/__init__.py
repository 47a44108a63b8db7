"""Members elsewhere: what goes over the wire."""
