def trainer_init(*arguments):
    raise AssertionError("only for a server of vLLM")
