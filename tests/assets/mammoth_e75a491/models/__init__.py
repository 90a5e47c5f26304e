import importlib


def get_model(args, backbone, loss, transform, dataset):
    return importlib.import_module(f"models.{args.model}").Model(backbone, loss, args, transform, dataset=dataset)
