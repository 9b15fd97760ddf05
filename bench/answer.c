// A small HTTP server for bench/route: GET /N answers with N bytes, POST with what it has read. One thread for each connection, which it keeps.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

static char zeros[64 << 10];

static int send_all(int to, const char *bytes, size_t count) {
    while (count > 0) {
        ssize_t sent = send(to, bytes, count, MSG_NOSIGNAL);
        if (sent <= 0) return -1;
        bytes += sent;
        count -= sent;
    }
    return 0;
}

static void *talk(void *argument) {
    int client = (int)(long)argument, one = 1;
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    static _Thread_local char buffer[64 << 10], head[256];
    size_t have = 0;
    for (;;) {
        char *end;
        while (buffer[have] = 0, (end = strstr(buffer, "\r\n\r\n")) == NULL) {
            if (have + 1 >= sizeof buffer) goto over;
            ssize_t count = recv(client, buffer + have, sizeof buffer - 1 - have, 0);
            if (count <= 0) goto over;
            have += count;
        }
        *end = 0;
        int get = strncmp(buffer, "GET ", 4) == 0, closes = strcasestr(buffer, "\r\nconnection: close") != NULL;
        char *length = strcasestr(buffer, "\r\ncontent-length:");
        unsigned long body = length ? strtoul(length + 17, NULL, 10) : 0, read = 0;
        unsigned long count = get ? strtoul(buffer + 5, NULL, 10) : 0;
        size_t used = end + 4 - buffer, rest = have - used;
        unsigned long now = rest < body ? rest : body;
        read += now;
        memmove(buffer, buffer + used + now, rest - now);
        have = rest - now;
        while (read < body) {
            ssize_t more = recv(client, buffer, body - read < sizeof buffer - 1 ? body - read : sizeof buffer - 1, 0);
            if (more <= 0) goto over;
            read += more;
        }
        int answer = snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Length: %lu\r\n%s\r\n", count, closes ? "Connection: close\r\n" : "");
        // Small ones in one piece.
        if (count <= 64) {
            memset(head + answer, '.', count);
            answer += count;
            count = 0;
        }
        if (send_all(client, head, answer)) break;
        while (count > 0) {
            size_t piece = count < sizeof zeros ? count : sizeof zeros;
            if (send_all(client, zeros, piece)) goto over;
            count -= piece;
        }
        if (closes) break;
    }
over:
    close(client);
    return NULL;
}

int main(int count, char **arguments) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(count > 1 ? atoi(arguments[1]) : 8000)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) {
        perror("listen");
        return 1;
    }
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 << 10);
    for (;;) {
        pthread_t thread;
        int client = accept(listener, NULL, NULL);
        if (client >= 0 && pthread_create(&thread, &attributes, talk, (void *)(long)client)) close(client);
    }
}
