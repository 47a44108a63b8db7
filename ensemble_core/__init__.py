"""The engine of Unisono: members, alignment of vocabularies, fusion and decoding. It knows no HTTP."""
