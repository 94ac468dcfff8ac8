"""What runs all the time: the gateway, generation and reward on Ray Serve, and the feedback service."""
