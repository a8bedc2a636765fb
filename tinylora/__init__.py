"""tinylora: fine-tune a language model by training 1 to a few hundred numbers, and prove what that did."""

__version__ = "0.1.0"
