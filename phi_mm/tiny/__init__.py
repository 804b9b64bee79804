"""The tiny world: drawn scenes, plain sentences about them, speech, and small base models."""
