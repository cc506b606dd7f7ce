"""Building blocks of the zoo; they import torch only."""
