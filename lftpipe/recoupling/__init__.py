"""The recoupling map: couplings of all pairs of states, and the blocks that it suggests. No teacher."""
