def packed_nccl_broadcast_producer(*arguments):
    raise AssertionError("only for a server of vLLM")
