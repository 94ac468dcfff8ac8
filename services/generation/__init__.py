"""The deployment that draws images: accord.diffusion.engine on Ray Serve."""
