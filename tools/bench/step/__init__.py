"""A whole training step of LoRA, fastlora beside eager PyTorch, torch.compile and the peers, each in its own process.

The parent (`command`) touches no model: it starts one worker (`worker`) for the weights, one for the truth, one for the
ceilings and one for each contender, compares the gradients that they leave in files, and shows what was measured.
Nothing that a contender patches or caches can reach another one.
"""
