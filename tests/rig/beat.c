/* Writes a byte to its output, fifty times a second, until it is ended: see scripts/rig. */
#include <time.h>
#include <unistd.h>

int main(void)
{
    const struct timespec pause = { .tv_nsec = 20000000 };

    for (;;) {
        if (write(1, "\n", 1) < 0)
            return 0;
        nanosleep(&pause, NULL);
    }
}
