"""The commands of `unbroken`. torch and ray take seconds to import, so commands import inside: --help is quick."""
