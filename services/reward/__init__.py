"""The deployment that scores images: accord.reward on Ray Serve."""
