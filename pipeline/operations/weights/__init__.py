"""The weights of backbones on this machine: where they are, and fetching them before a run asks for them."""
