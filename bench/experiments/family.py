"""x"""


def add_options(command, count, number):
    pass
