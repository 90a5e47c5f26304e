"""Stand-in for Mammoth at commit e75a491: the modules, names and signatures that the integration meets, and no more."""

import argparse

import torch
from datasets import get_dataset


def main():
    from backbone import get_backbone
    from models import get_model

    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--setting", default="class-il")
    parser.add_argument("--distributed", default="no")
    parser.add_argument("--code_optimization", type=int, default=0)
    args = parser.parse_args()
    dataset = get_dataset(args)
    model = get_model(args, get_backbone(args), torch.nn.functional.cross_entropy, None, dataset)
    for _ in range(dataset.N_TASKS):
        model.net.train()
        loader, _ = dataset.get_data_loaders()
        model.meta_begin_task(dataset)
        for inputs, labels, not_aug_inputs in loader:
            model.meta_observe(inputs, labels, not_aug_inputs, epoch=0)
        model.meta_end_task(dataset)


if __name__ == "__main__":
    main()
