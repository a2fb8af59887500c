"""The whole way on one machine: a checkpoint is served over S3, streamed back and compared tensor by tensor."""
