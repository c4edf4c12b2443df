"""A sparse run: its processors and hooks in a pipeline, and what they ask of svg_attention."""
