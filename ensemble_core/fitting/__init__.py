"""What is learned offline: graphs of models, found by a swarm."""
