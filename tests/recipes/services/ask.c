// Asks the identity endpoint on its local socket, as services would.
//
//   ask get [QUERY]     its answer: status and body
//   ask post BODY       posts BODY: the status
//   ask race            asks until the identity is there, and 1000 times at least; says how often it was absent, whole or torn
//   ask listen          a service that is told in-process, and says what
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static char answer[65536];

// The status; `answer` is the body.
static int ask(const char *method, const char *path, const char *body) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/run/offshoot/identity.sock"};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0) {
        perror("identity.sock");
        exit(1);
    }
    dprintf(fd, "%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %zu\r\n\r\n%s", method, path, strlen(body), body);
    size_t length = 0;
    ssize_t got;
    while (length < sizeof answer - 1 && (got = read(fd, answer + length, sizeof answer - 1 - length)) > 0)
        length += (size_t)got;
    close(fd);
    answer[length] = 0;
    int status = 0;
    char *end = strstr(answer, "\r\n\r\n");
    if (sscanf(answer, "HTTP/1.1 %d", &status) != 1 || !end) {
        fprintf(stderr, "no answer: %s\n", answer);
        exit(1);
    }
    memmove(answer, end + 4, strlen(end + 4) + 1);
    return status;
}

static int whole(void) {
    const char *parts[] = {"\"state\":\"applied\"", "\"id\":\"", "\"name\":\"", "\"labels\":{", "\"tenant\":\"", "\"note\":\""};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (!strstr(answer, parts[i]))
            return 0;
    return answer[strlen(answer) - 1] == '}';
}

static int race(void) {
    int absent = 0, there = 0, torn = 0;
    puts("racing");
    fflush(stdout);
    while (absent + there + torn < 1000 || there + torn == 0) {
        int status = ask("GET", "/internal/fork-identity/config", "");
        if (status == 202)
            absent++;
        else if (status == 200 && whole())
            there++;
        else
            torn++;
    }
    printf("absent %d, whole %d, torn %d\n", absent, there, torn);
    fflush(stdout);
    pause();
    return 0;
}

static int listen_to_events(void) {
    const char *number = getenv("OFFSHOOT_EVENT_FD");
    FILE *events = number ? fdopen(atoi(number), "r+") : NULL;
    static char line[65536];
    puts("listening");
    fflush(stdout);
    while (events && fgets(line, sizeof line, events)) {
        char *id = strstr(line, "\"id\":"), *tenant = strstr(line, "\"TENANT\":\""), *name = strstr(line, "\"OFFSHOOT_NAME\":\"");
        printf("told %.*s", name ? (int)strcspn(name + 17, "\"") : 0, name ? name + 17 : "");
        printf(" of %.*s\n", tenant ? (int)strcspn(tenant + 10, "\"") : 6, tenant ? tenant + 10 : "nobody");
        fflush(stdout);
        fseek(events, 0, SEEK_CUR);
        fprintf(events, "{\"type\":\"done\",\"id\":%d}\n", id ? atoi(id + 5) : 0);
        fflush(events);
    }
    puts("nobody tells me any more");
    return 1;
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "race"))
        return race();
    if (argc > 1 && !strcmp(argv[1], "listen"))
        return listen_to_events();
    if (argc == 3 && !strcmp(argv[1], "post")) {
        printf("%d\n", ask("POST", "/internal/fork-identity", argv[2]));
        return 0;
    }
    char path[256];
    snprintf(path, sizeof path, "/internal/fork-identity/config%s%s", argc > 2 ? "?" : "", argc > 2 ? argv[2] : "");
    int status = ask("GET", path, "");
    printf("%d %s\n", status, answer);
    return 0;
}
