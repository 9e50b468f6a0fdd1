"""Export the image and text towers to ONNX, TorchScript and torch.export, and verify every file against PyTorch."""
