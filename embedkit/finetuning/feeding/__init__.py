"""What training sees: images decoded ahead, varied, and mixed."""
