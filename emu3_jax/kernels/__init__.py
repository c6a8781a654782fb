"""Attention kernels: each module has `forward` and `backward` on what one device holds."""
