"""Export of the towers to ONNX, TorchScript and torch.export, each file proved against PyTorch in a process of its own."""
