"""Training frameworks: one module each, which alone imports the framework. Importing this package imports none of them.

    lighthouse_fx.integrations.huggingface    LighthouseCallback for `transformers.Trainer`
    lighthouse_fx.integrations.lightning      LighthouseCallback for `lightning.pytorch.Trainer`

Accelerate, litgpt and plain PyTorch need nothing of their own: see examples/frameworks.
"""
