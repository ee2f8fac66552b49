"""What a pair takes of a machine, from its configurations alone: integers, no tensors, nothing downloaded."""
