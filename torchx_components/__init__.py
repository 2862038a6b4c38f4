"""TorchX components of hstu-plugin: ``torchx run -s local_cwd hstu.train --config config.yaml``."""
