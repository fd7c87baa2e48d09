/* What the test programs share. A program that prints nothing and returns 0 has passed. */
#ifndef CHECK_H
#define CHECK_H

#include <gleaner.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QUESTION "What is the name of the mayor of Pellinbridge?"

#define CHECK(condition)                                                       \
    do {                                                                       \
        if (!(condition)) {                                                    \
            printf("%s:%d: not so: %s (%s)\n", __FILE__, __LINE__, #condition, \
                   gleaner_last_error(NULL));                                  \
            exit(1);                                                           \
        }                                                                      \
    } while (0)

/* The call fails with this status, and the engine's last error says so in these words. */
#define FAILS(engine, call, status, words)                                      \
    do {                                                                        \
        gleaner_status got = (call);                                            \
        const char *said = gleaner_last_error(engine);                          \
        if (got != (status) || !strstr(said, words)) {                          \
            printf("%s:%d: %s gave %d: %s\n", __FILE__, __LINE__, #call, (int)got, said); \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

#endif
