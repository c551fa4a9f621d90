"""How the embedded base `powersteer-tiny` was made: icons → tokenizer → CLIP → VAE → U-Net, a stage a file."""
