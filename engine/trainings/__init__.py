"""The kinds of training that the loop steps: pre-training, the decoder against a discriminator, generators."""
