"""Takes the trainer's weights to rollout servers: what is sent, how it is packed, and the ways it can go."""
