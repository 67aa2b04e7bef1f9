// Stands in for MLX's header, which is written on compiler internals; shim.h has the overloads.
#pragma once
