"""The ops as PyTorch knows them: schema, fake and autograd, and which kernels serve a tensor."""
