"""Pixels <-> codes: Emu3's vision tokenizer in Flax, its training, and its conversion."""
