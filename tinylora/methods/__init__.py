"""What can be trained instead of TinyLoRA's v, behind the same loop: LoRA and its kin, adapter layers, everything."""
