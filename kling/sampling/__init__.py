"""A prompt's way: request, inputs, plan, pipeline, sampler; and the record that makes a video again."""
