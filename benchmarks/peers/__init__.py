"""fedlora's simulator beside Flower's and pfl-research's."""
