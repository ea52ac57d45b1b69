// json.h - reading JSON that nobody vouches for: the headers and configs of model files.
//
// Every error is one line "WHERE: FIELD: expected ..., found ...", where WHERE is the file and, inside it, the part.
// Duplicate keys and deep nesting are errors: which of two values holds should not depend on the reader.
#pragma once
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>
#include "base.h"

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;    // prints its keys in the order they were added

// Text out of a file, fit for one line of an error message: control bytes become '?', length is limited.
inline std::string printable(std::string text) {
    if (text.size() > 80) text = text.substr(0, 80) + "...";
    for (char &c : text) if ((unsigned char)c < 32 || c == 127) c = '?';
    return text;
}

// A value for an error message.
inline std::string show_json(const Json &value) {
    if (value.is_object()) return "an object";
    if (value.is_array() && value.size() > 8) return strf("a list of %zu", value.size());
    return printable(value.dump(-1, ' ', false, Json::error_handler_t::replace));
}

inline Json parse_strict_json(const char *text, size_t bytes, const std::string &where, size_t max_depth = 16) {
    std::vector<std::set<std::string>> keys;    // of the objects and lists that are open
    auto check = [&](int, Json::parse_event_t event, Json &value) {
        using Event = Json::parse_event_t;
        if (event == Event::object_start || event == Event::array_start) {
            if (keys.size() == max_depth) fail("%s: nested deeper than %zu", where.c_str(), max_depth);
            keys.emplace_back();
        } else if (event == Event::object_end || event == Event::array_end) {
            keys.pop_back();
        } else if (event == Event::key && !keys.back().insert(value.get_ref<const std::string &>()).second) {
            fail("%s: the key %s occurs twice", where.c_str(), show_json(value).c_str());
        }
        return true;
    };
    try {
        return Json::parse(text, text + bytes, check);
    } catch (const Json::exception &e) {
        fail("%s: not valid JSON (byte %d)", where.c_str(),
             e.id == 101 ? (int)static_cast<const Json::parse_error &>(e).byte : 0);
    }
}

inline const Json &get_field(const Json &object, const char *key, const std::string &where) {
    const auto found = object.find(key);
    if (found == object.end()) fail("%s: %s: missing", where.c_str(), key);
    return *found;
}

// A whole number in [min, max].  Floats are not whole numbers here, whatever their value.
inline int64_t get_int(const Json &value, const char *key, int64_t min, int64_t max, const std::string &where) {
    const uint64_t largest = (uint64_t)std::numeric_limits<int64_t>::max();
    const bool fits = value.is_number_unsigned() ? value.get<uint64_t>() <= largest : value.is_number_integer();
    if (!fits || value.get<int64_t>() < min || value.get<int64_t>() > max) {
        fail("%s: %s: expected a whole number from %lld to %lld, found %s", where.c_str(), key, (long long)min,
             (long long)max, show_json(value).c_str());
    }
    return value.get<int64_t>();
}

// A number in [min, max] as f32.
inline float get_float(const Json &value, const char *key, double min, double max, const std::string &where) {
    if (!value.is_number() || !(value.get<double>() >= min && value.get<double>() <= max)) {
        fail("%s: %s: expected a number from %g to %g, found %s", where.c_str(), key, min, max,
             show_json(value).c_str());
    }
    return value.get<float>();
}

inline bool get_bool(const Json &value, const char *key, const std::string &where) {
    if (!value.is_boolean()) {
        fail("%s: %s: expected true or false, found %s", where.c_str(), key, show_json(value).c_str());
    }
    return value.get<bool>();
}

inline const std::string &get_string(const Json &value, const char *key, const std::string &where) {
    if (!value.is_string()) fail("%s: %s: expected a string, found %s", where.c_str(), key, show_json(value).c_str());
    return value.get_ref<const std::string &>();
}
