"""What a decoder does between its matrix products: `native` in C for CPUs, `reference` in torch for any device."""
