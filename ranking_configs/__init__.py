"""Recipes of ``hstu-rank``: ``NAME.yaml`` says how to train, ``NAME.schema.yaml`` what the data set's columns are."""
