"""The TorchX door: jobs from module names. The components themselves are the package ``torchx_components``."""
