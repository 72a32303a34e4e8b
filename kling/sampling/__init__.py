"""From a prompt to a video: request, inputs, plan, pipeline, sampler; and the record from which a video can be made again."""
