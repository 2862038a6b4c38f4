"""The ranking door: tables with documented schemas, training and evaluation, the command ``hstu-rank``."""
