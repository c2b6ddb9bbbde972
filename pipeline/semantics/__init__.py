"""The fits behind the stuff maps: STEGO, DatUS2, and DeepLabV3 as a refinement."""
