/* The adversary: threads and processes that write down what they see, as fast as they can.
 *
 * Each has a ring of entries in /dev/shm/watch/N.log. An entry's clock is read first, so that an entry whose clock is
 * later than the freeze was written after it as a whole. Once a writer has an identity and has seen it often enough it
 * stops, such that its first entries in the fork are not overwritten. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum { ENTRIES = 8192, THREADS = 3, PROCESSES = 2, ENOUGH = 1000 };

struct entry {
    uint64_t counter, monotonic, realtime;
    uint8_t random[8];
    char id[24], hostname[64];
    uint64_t end; /* equals the counter once the entry is whole */
};

static uint64_t now(clockid_t clock) {
    struct timespec time;
    clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void *watch(void *number) {
    char path[64];
    snprintf(path, sizeof path, "/dev/shm/watch/%d.log", (int)(intptr_t)number);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || ftruncate(fd, ENTRIES * sizeof(struct entry))) { perror(path); exit(1); }
    struct entry *ring = mmap(NULL, ENTRIES * sizeof *ring, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ring == MAP_FAILED) { perror("mmap"); exit(1); }
    int seen = 0;
    for (uint64_t counter = 1; seen < ENOUGH; counter++) {
        struct entry *entry = &ring[counter % ENTRIES];
        struct utsname name;
        entry->end = 0;
        entry->counter = counter;
        entry->monotonic = now(CLOCK_MONOTONIC);
        entry->realtime = now(CLOCK_REALTIME);
        memset(entry->id, 0, sizeof entry->id);
        int id = open("/run/offshoot/id", O_RDONLY | O_CLOEXEC);
        ssize_t len = id < 0 ? 0 : read(id, entry->id, sizeof entry->id - 1);
        if (id >= 0) close(id);
        uname(&name);
        memset(entry->hostname, 0, sizeof entry->hostname);
        memcpy(entry->hostname, name.nodename, strnlen(name.nodename, sizeof entry->hostname - 1));
        if (getrandom(entry->random, sizeof entry->random, GRND_NONBLOCK) != sizeof entry->random) exit(1);
        __atomic_store_n(&entry->end, counter, __ATOMIC_RELEASE);
        seen += len > 0;
    }
    snprintf(path, sizeof path, "/dev/shm/watch/%d.done", (int)(intptr_t)number);
    close(open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
    for (;;) pause();
}

int main(void) {
    mkdir("/dev/shm/watch", 0755);
    int number = 0;
    for (; number < PROCESSES; number++)
        if (fork() == 0) watch((void *)(intptr_t)number);
    for (; number < PROCESSES + THREADS; number++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, watch, (void *)(intptr_t)number)) return 1;
    }
    /* Entries from before the capture are part of the test. */
    sleep(1);
    puts("watching");
    fflush(stdout);
    for (;;) pause();
}
