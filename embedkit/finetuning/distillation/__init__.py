"""Distillation: a student reproduces its teachers' embeddings."""
