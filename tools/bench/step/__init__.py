"""`fastlora bench step`: a whole LoRA training step with fastlora, eager PyTorch, torch.compile and other libraries.

The parent (`command`) loads no model. It starts one worker process (`worker`) to make the weights, one for the float32
reference, one for the peak rates and one for each contender, and compares the gradients that they write to files. So
nothing that a contender patches or caches affects another one.
"""
