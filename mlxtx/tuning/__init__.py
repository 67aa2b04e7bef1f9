"""Fine-tuning and training on the device: samples in, adapters or a model out."""
