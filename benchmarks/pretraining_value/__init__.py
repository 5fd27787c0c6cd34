"""What is stage 1 worth when the encoder is fine-tuned?"""
