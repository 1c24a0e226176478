"""Recipes: one flat, complete YAML file a run."""
