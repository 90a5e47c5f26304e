def get_model(model_name, args):
    from models.replay import Replay

    return Replay(args)
