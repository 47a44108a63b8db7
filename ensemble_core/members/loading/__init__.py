"""Everything between a configuration and a resident member: checkpoints, memory, placement, proof."""
